"""What a program runs on: devices and their peaks, and the target that programs are compiled for."""
