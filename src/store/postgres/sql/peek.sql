-- $1 key.
SELECT false AS changed, {columns}, NULL AS told FROM (SELECT s.*, {now} AS now FROM {table} s WHERE s.key = $1) r
