"""The chat service: HTTP API, request queue, replicas.

Called by `scripts/chat_web.py`. The modules in the order of a message and its answer:

routes_chat.py    the request's fields, the answer's fields
messages.py       the messages as clients send them, as a conversation and a GenerationRequest
generation.py     one HTTP request: submits its prompts, receives tokens on the event loop
service.py        one replica: the queue and the running batch (nanochat/inference/decoding.py) on a thread
sample.py         tokens of one sample to text: whole characters, stop strings, tool calls
answers.py        whole JSON answers and server-sent events

server.py puts the application together; guard.py checks keys and limits before it, body.py bodies;
remote_service.py runs a replica in a process of its own.
"""
