import sys

from usp.demo.command import main

if __name__ == "__main__":
    sys.exit(main())
