"""The routes of the endpoint, a file for each resource."""
