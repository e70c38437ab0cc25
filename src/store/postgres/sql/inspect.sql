-- $1 the table, with its schema and quoted as in SQL. How the table is stored, and which columns it has.
SELECT c.relpersistence::text AS persistence,
    coalesce(array_agg(a.attname::text || ' ' || format_type(a.atttypid, NULL)) FILTER (WHERE a.attname IS NOT NULL), '{}') AS columns,
    current_setting('server_version_num')::integer AS version
FROM pg_class c LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.oid = to_regclass($1)
GROUP BY c.relpersistence
