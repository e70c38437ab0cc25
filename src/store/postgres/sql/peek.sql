-- $1 key, $2 question. A standby shows what its primary had a while ago, and an absent record there proves nothing. One row, whether there is a record or not: no row at all is the reply to another statement.
SELECT false AS changed, {columns}, pg_is_in_recovery() AS standby, {tag} AS statement, $2::bigint AS question
FROM (SELECT) one LEFT JOIN (SELECT s.*, {now} AS now FROM {table} s WHERE s.key = $1) r ON true
