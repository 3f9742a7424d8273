"""Who may do what: keys and their scopes, the route × scope table, and the limits of each key.

`key` is a key and what it allows; `secret` turns keys into digests; `store` keeps them in the database; `access` says which scope
opens which route; `guard` knows a caller by the key that was sent; `limits` counts what each caller does.
"""
