"""Resources: hosts, devices, pools, models, footprints, namespaces."""
