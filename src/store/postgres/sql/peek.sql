-- $1 key, $2 question.
--
-- Returns whether the server is a standby, because an absent record there proves nothing. Returns
-- one row even if no record exists, so that a reply without rows is known to belong to another
-- statement.
SELECT false AS changed, {columns}, pg_is_in_recovery() AS standby, {tag} AS statement, $2::bigint AS question
FROM (SELECT) one LEFT JOIN (SELECT s.*, {now} AS now FROM {table} s WHERE s.key = $1) r ON true
