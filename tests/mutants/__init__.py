"""Small faults, put into the sources one at a time, that the tests have to notice: `make mutants`."""
