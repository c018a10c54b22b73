"""VBench-Long (`long_custom_input`): six dimensions of long videos.

::

    from lrag_ray.scoring.vbench_long.networks import Networks
    from lrag_ray.scoring.vbench_long.score import VideoSource, score_video
    from lrag_ray.scoring.vbench_long.weights import WeightFiles

    networks = Networks(WeightFiles(Path("weights")), "cuda")
    rows = [row for path in videos for row in score_video(VideoSource(path, str(path)), networks)]
    print(aggregate(rows).mean_over_clips)

Importing this package loads nothing; `names` is all that a configuration needs.
"""
