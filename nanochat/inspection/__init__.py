"""What a checkpoint, an export or another program's model holds, and how two of them differ, from their headers."""
