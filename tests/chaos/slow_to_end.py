"""Imported by a fork server that is never to come to the end of Python's own way out."""

import atexit
import threading

atexit.register(threading.Event().wait)
