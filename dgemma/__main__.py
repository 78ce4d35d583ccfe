"""python -m dgemma"""

from dgemma.cli import main

main()
