//! Transfers of blocks between the device and page-locked host memory, beside plain copies of the same bytes.

use crate::table::Table;

pub(crate) fn measure(table: &mut Table) -> anyhow::Result<()> {
    let mut group = "";
    kv_cache::cuda::transfer_figures(0, &mut |figure| {
        if figure.group != group {
            group = figure.group;
            table.group(group);
        }
        match figure.ratio {
            Some(ratio) => table.row(&figure.what, figure.value, figure.unit, Some((ratio, &figure.of))),
            None if figure.of.is_empty() => table.row(&figure.what, figure.value, figure.unit, None),
            None => table.row(&format!("{}: {}", figure.what, figure.of), figure.value, figure.unit, None),
        }
    })?;
    Ok(())
}
