"""The page at the HTTP port: jobs and their gradients, live, with buttons that do what the gRPC calls do.

`views` turns what is stored into JSON, `live` sends what is new to open pages, `actions` carries out buttons, `sign_in`
is for services with tokens, `app` puts them together; `static` is the page itself, plain JavaScript without a build
step.
"""
