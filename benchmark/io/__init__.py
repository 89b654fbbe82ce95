"""All disk and net: checkpoint folders, safetensors, PEFT, ONNX, wheels, the hub."""
