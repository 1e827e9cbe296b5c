"""Answers requests over HTTP with a trained model (``launch serve``); an ONNX file needs no torch."""
