"""Raw record → Sample → MDS shards. Begin with coco.py."""
