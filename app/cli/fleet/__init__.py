"""Commands for hosts, devices, pools, models and namespaces."""
