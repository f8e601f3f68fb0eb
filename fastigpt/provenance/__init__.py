"""Where a picture comes from: signed into its file as C2PA has it, and read back from files of anyone.

Needs c2pa-python (extra `c2pa`), whose import takes a while: the modules are imported where they are used.
"""
