"""The chat service: HTTP API, request queue, replicas.

Called by `scripts/chat_web.py`.
Start with `server.py` (routes), then `service.py` (the queue and the batch).
"""
