"""What people look at.

pictures.py     boxes with class names and scores on images
charts.py       learning curve, precision over recall, confusion matrix
reports.py      the pictures of a training and of an evaluation
html_report.py  report.html: all of an evaluation in one file
own_images.py   ``evaluate.py --images``: detections on images without annotations
"""
