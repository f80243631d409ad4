"""What `launch/prepare_data.py` does: COCO 2014, VOC 2012, own folders, the composed stampscenes, pretrained weights.

coco (with coco_index, coco_lists), voc (with voc_image, matfile) and folder stand on inputs (finds, unpacks, links),
archives (safe unpacking), work (what makes a kill harmless), manifest and legacy. verify compares the checksums of what
was prepared, check decodes what the loader reads of any set.
"""
