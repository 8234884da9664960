"""An order: stock, a manager's approval of large sums, the payment on a queue of its own, parcels side by side; all of
it undone if a parcel cannot be sent."""
