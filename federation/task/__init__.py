"""What a task's model.py and data.py may import, and how a task is opened: nothing here knows the network."""
