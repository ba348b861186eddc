"""How ``benchmarks/gpu.py`` runs: steps that cannot take each other's results along.

Each step is a process that is watched from outside (:mod:`.processes`). Rows and test results are
in the folder of results the moment they exist (:mod:`.records`, :mod:`.recorder`), the summary
after each step (:mod:`.runner`, :mod:`.summary`), and the folder has few files, none of them large
(:mod:`.folder`). :mod:`.plan` has the steps, and :mod:`.carried` what was compiled beforehand.

Nothing here imports torch, but the plugin of pytest: what runs the steps must not share their fate.
"""
