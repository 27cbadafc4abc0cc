"""What the tests share: modules come from the repository's root, and a few ways to make files and configs.

    python -m pytest                          # all of them, from the root
    python -m pytest tests/test_prepare.py -k chat
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
