"""python -m litlora"""

from litlora.cli import main

main()
