"""`python -m convert` lists the converters."""

COMMANDS = {
    "coco": "COCO instances (instances.json)",
    "lvis": "LVIS v0.5 and v1 instances",
    "visual_genome": "Visual Genome (region descriptions, or objects with attributes)",
    "refcoco": "RefCOCO, RefCOCO+ and RefCOCOg (refs and instances)",
    "parquet": "Hugging Face object detection in parquet",
    "voc": "Pascal VOC (a folder of .xml files)",
    "jsonl": "JSON lines of this recipe (one record per line, chats too)",
    "yolo": "YOLO (data.yaml, or a folder with classes.txt)",
    "odvg": "ODVG lines of Grounding DINO",
    "chat": "chats of Qwen, ms-swift, LLaMA-Factory and LLaVA",
    "shapes": "synthetic scenes, to try things out",
    "teachers": "choose a pool of teachers from a converted data set",
    "verify": "check a converted data set",
}

if __name__ == "__main__":
    print("Convert a data set to MDS shards; each command explains itself with --help:\n")
    for name, what in COMMANDS.items():
        print(f"  python -m convert.{name:<13} {what}")
