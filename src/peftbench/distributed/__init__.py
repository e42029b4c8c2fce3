"""Engines that spread a training over processes and devices, and how the processes of one run communicate."""
