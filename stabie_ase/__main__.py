"""`python -m stabie_ase` is the `stabie-ase` command."""

from stabie_ase.cli import main

main()
