"""int8 models by ONNX Runtime: ranges measured once, layers equalized, each way of quantizing made from them."""
