"""The chat service: HTTP API, request queue, replicas.

Called by `scripts/chat_web.py`.
A message's way: `routes_chat.py` -> `generation.py` -> `service.py` (queue, batch). `server.py` puts them together.
"""
