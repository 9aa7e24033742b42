"""The online endpoint: rendering requests, video jobs, the HTTP interface, Ray Serve. Sibling of `catalog`."""
