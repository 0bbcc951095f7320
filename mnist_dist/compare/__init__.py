"""`mnist-dist compare`: a table and an HTML page of runs."""
