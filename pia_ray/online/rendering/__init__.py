"""From a request to an encoded video: the renderer's interface, one in this process, and how long a video takes."""
