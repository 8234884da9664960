"""A report of each night, started by the clock: one flow a night however many beats there are, nights that were missed
made up for, and never two at once."""
