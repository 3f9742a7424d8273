"""The OpenAPI document of the server: made from the models that read the requests, so that it says what they take.

operations   the table of routes: what each takes, answers and refuses
schemas      the parts that the table refers to: of pydantic models, and of what the routes answer
document     the two put together; `trimtab openapi` writes it, GET /openapi.json serves it
"""
