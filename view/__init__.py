"""What people look at.

pictures.py    boxes with class names and scores on images
charts.py      precision over recall, and the confusion matrix
reports.py     the pictures of a training's inputs and of an evaluation
own_images.py  ``evaluate.py --images``: detections on images without annotations
"""
