"""gRPC, on the event loop of the HTTP service: other words for the same requests, and the same way to a proven reply.

message ── requests ──► OpenAI's JSON ──► `service.generation` ──► OpenAI's JSON ── replies ──► message
"""
