"""Plan -> Kubernetes objects. Pure: the same plan and manifest give the same objects, byte by byte."""
