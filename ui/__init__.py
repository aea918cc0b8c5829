"""The browser app: the only place that knows Gradio.

``app.py`` builds and serves it; each screen is one Python file (its questions and actions) and one script of the
same name in ``static/`` (its looks). What is on screen is a function of ``runs.db`` and of the worker's state:
pages ask for the database's revision once a second and fetch only when it has moved.
"""
