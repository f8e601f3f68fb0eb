"""`fastigpt serve`: the Images API over a running batch, for any loaded model.

batch.py is the heart: one thread for each model draws everybody's canvases side by side. Around it parameters.py says
what a request may hold, served.py what it means to a model, images.py answers it, app.py puts the routes together and
run.py is the process.
"""
