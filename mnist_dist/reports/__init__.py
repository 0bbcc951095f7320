"""Pictures, pages and tables of runs, networks and timings. Importing one loads matplotlib only where it draws."""
