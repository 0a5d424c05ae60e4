"""Data as people have it -> a data set that training reads.

    build      the plan, the shards, the finished data set
    report     what was skipped and why; a preview of samples
    engines    where shards run: processes, Beam, Ray
    files      the files of a data set
    inputs     files -> rows
    records    rows -> records, or the reason why a row is skipped

One file a format: folder, webdataset, parquet, llava, text.

To add a format:

1. Write `prepare/NAME.py` with one function
   `read(shard, options, slices) -> (place, RawRecord or Skipped), ...`. A shard is a dict
   {path, name} of one input file. Yield its records in their order. Yield a `Skipped` for what
   cannot be used, never raise it: `records.convert` turns rows into such pairs.
2. Add a line to `build.FORMATS`: the plan (`inputs.whole_files(SUFFIXES)`: one shard a file),
   `read`, and the kinds of records that the format can hold. The command line reads this table.
3. Add a row to the table "Formats" of docs/data_at_scale.md, and a case to
   tests/test_data_formats.py.

`records.to_record` checks the texts, images and ids of every format. A format of one large file has
a plan of its own, such as `text.plan` (ranges of bytes) or `llava.plan` (slices of a list).
"""
