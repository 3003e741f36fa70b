"""Imported first by the template process of the pool: its path is that of the tests alone.

Python puts the folder in which a program is started before PYTHONPATH, and in a clone that folder
holds the sources, not what was installed.
"""

import sys

sys.path[:] = [folder for folder in sys.path if folder]
