"""The tests of pia_ray, training, jobs, docs and cluster, each folder of tests under the name of what it tests."""
