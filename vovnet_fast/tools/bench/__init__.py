"""Measuring, and what is made of measurements: ``vovnet-fast bench`` and its report.

* :mod:`~vovnet_fast.tools.bench.stopwatch`: times calls in turn, and says how sure a ratio is,
* :mod:`~vovnet_fast.tools.bench.quick`: a table in a minute,
* :mod:`~vovnet_fast.tools.bench.training`: images, and a training step on them,
* :mod:`~vovnet_fast.tools.bench.rows`: the rows of pytest-benchmark's files, checked,
* :mod:`~vovnet_fast.tools.bench.report`: Markdown of such rows,
* :mod:`~vovnet_fast.tools.bench.verdicts`: what of it is faster, slower, or missing,
* :mod:`~vovnet_fast.tools.bench.tables`: its tables,
* :mod:`~vovnet_fast.tools.bench.plots`: its pictures, with matplotlib,
* :mod:`~vovnet_fast.tools.bench.command`: the options and tables of ``vovnet-fast bench``.

The suites that make the rows are in ``benchmarks/`` of the repository.
"""
