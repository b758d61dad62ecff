"""Parts of networks and of their training that any model.py may use: nothing here knows the federation."""
