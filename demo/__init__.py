"""The main job of this project on real images, from training to the file that a phone runs: `make demo`."""
