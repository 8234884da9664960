"""Audits the installed packages of a Python environment: is every file still what its package's RECORD says?"""
