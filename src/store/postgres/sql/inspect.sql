-- $1 the table, with its schema and quoted as in SQL, $2 question.
--
-- Returns whether the table exists, how it is stored, its columns, whether its index exists, the
-- missing rights, and whether the server is read-only. The rows of a partitioned table are in its
-- partitions, and each partition may be unlogged. A view has no columns here, because the check
-- cannot see how its rows are stored.
SELECT c.oid IS NOT NULL AS exists,
    coalesce(
        (SELECT p.relpersistence FROM pg_partition_tree(c.oid) t JOIN pg_class p ON p.oid = t.relid WHERE p.relpersistence <> 'p' LIMIT 1),
        c.relpersistence
    )::text AS persistence,
    ARRAY(
        SELECT a.attname::text || ' ' || format_type(a.atttypid, NULL) FROM pg_attribute a
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'p')
    ) AS columns,
    EXISTS (
        SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
        WHERE i.indrelid = c.oid AND a.attname = 'expires'
    ) AS indexed,
    ARRAY(
        SELECT needed FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS needed
        WHERE NOT has_table_privilege(c.oid, needed)
    ) AS missing,
    pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean AS read_only,
    row_security_active(c.oid) AS filtered,
    current_setting('server_version_num')::integer AS version,
    {tag} AS statement, $2::bigint AS question
FROM (SELECT) one LEFT JOIN pg_class c ON c.oid = to_regclass($1)
