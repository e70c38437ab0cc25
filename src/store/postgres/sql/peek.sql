-- $1 key. A standby shows what its primary had a while ago, and an absent record there proves nothing: one row in every case.
SELECT false AS changed, {columns}, NULL AS told, pg_is_in_recovery() AS standby
FROM (SELECT) one LEFT JOIN (SELECT s.*, {now} AS now FROM {table} s WHERE s.key = $1) r ON true
