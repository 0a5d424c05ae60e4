"""Data as people have it -> a data set that training reads.

    build      the plan, the shards, the finished data set
    report     what was skipped and why; a preview of samples
    engines    where shards run: processes, Beam, Ray
    files      the files of a data set
    inputs     files -> rows
    records    rows -> records, or the reason why a row is skipped

One file a format: folder, webdataset, parquet, llava, text.

To add a format:

1. Write `prepare/NAME.py` with
   `KINDS`: what its records can be (of `records.KINDS`); the first is the default.
   `plan(options, slices) -> shards`, in a fixed order. A shard is a dict that JSON can hold, such
   as {path, name} of one input file; `slices` is a folder for rows that the plan has read
   (`inputs.write_slices`).
   `read(shard, options) -> rows` of one shard, in their order: (place, id, fields), with a Skipped
   as fields of what cannot be used. A Skipped that it raises ends the shard.
2. Add a line to `build.FORMATS`. The command line reads this table.
3. Add a row to the table "Formats" of docs/data_at_scale.md, and a case to
   tests/test_data_formats.py.

`records.to_record` checks the texts, images and ids of every format.
"""
